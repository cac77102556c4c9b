"""Which number format each weight gets, and how its codes are chosen."""
