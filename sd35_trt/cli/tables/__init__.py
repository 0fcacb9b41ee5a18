"""What commands print for people, one file a table."""
