"""How workers run: here, in processes of their own, or on other machines."""
