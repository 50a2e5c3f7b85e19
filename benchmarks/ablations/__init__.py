"""What single settings and operators cost."""
