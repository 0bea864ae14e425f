"""What came out: numbers, tables, pictures, the page."""
