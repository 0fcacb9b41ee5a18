"""What we use of other libraries beside their public API, a module for each."""
