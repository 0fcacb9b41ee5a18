"""How fast a bundle draws."""
