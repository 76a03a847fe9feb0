"""Customer service: an order is taken from a simulated customer who tells what they want when they are asked."""
