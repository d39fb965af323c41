"""What each API answers with, whole and in pieces."""
