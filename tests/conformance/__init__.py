"""Our token ids compared with those of `apply_chat_template`, for real tokenizers and their chat templates."""
