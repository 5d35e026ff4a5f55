"""What objectives are made of."""
