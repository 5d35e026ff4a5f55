"""The price of collectives, fitted to measurements of others."""
