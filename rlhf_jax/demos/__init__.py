"""Complete experiments on embedded tasks, from random weights to a report."""
