"""A game of TextArena against a fixed opponent. Needs the extra textarena."""
