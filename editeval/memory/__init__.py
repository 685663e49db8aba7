"""What methods share that remember facts beside the model and decide, request by request, which of them it is about."""
