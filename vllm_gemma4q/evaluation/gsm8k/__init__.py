"""GSM8K over the chat API: questions, prompts, answers, and two checkpoints on the same questions."""
