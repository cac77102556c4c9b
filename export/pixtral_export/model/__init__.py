"""Pixtral in torch: what is traced, and what exports are compared with."""
