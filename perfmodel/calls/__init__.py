"""What an ATen call is: its products, its kind, what it launches."""
