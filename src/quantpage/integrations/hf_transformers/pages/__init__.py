"""What lies under a cache: who holds its pages, which rows have which, one step over them."""
