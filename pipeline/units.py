"""What people count memory in."""

GIB = 1 << 30
