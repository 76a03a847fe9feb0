"""Text games: tic-tac-toe against a mixed opponent, and FrozenLake through the Gymnasium adapter."""
