"""Where rows are, and reading them."""
