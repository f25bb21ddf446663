"""What the kernels compile to, with no GPU: registers, spills, shared memory and instructions, held to budgets."""
