"""Customer service: the policy takes an order from a simulated customer, who answers questions about it."""
