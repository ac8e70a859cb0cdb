"""Training: gradients of a whole model, the optimizer that uses them, and the schedule of its rate."""
