"""What can be wrong, one family a file: each function takes a subject and an engine and yields findings."""
