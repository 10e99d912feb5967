"""What the chapters lean on, one subject a file."""
