"""Networks: policy, critic, reward model, packing, LoRA."""
