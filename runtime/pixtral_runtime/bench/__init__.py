"""How fast a bundle is here, beside what the machine could do."""
