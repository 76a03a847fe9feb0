"""Ground floor: the records that travel, the wires they travel on, and what to do when a part dies."""
