"""Groups of ranks: who is in one, how they meet and wait, what a coordinator does with them."""
