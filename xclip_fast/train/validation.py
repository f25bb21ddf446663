"""Accuracy on the validation videos after an epoch: one view each, as the official code has it."""
def validate(*a): return {"top1": None}
