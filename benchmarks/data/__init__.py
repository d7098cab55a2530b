"""How fast and how small reading data is."""
