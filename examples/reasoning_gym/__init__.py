"""Any task of the package reasoning-gym by its name, and a curriculum over several. Needs the extra reasoning-gym."""
