"""The other direction on the qwen family: a trained agent keeps its tool calls and gets thinking.

The agent is tuned from the trio's pretrained model: it calls the tool that a phrase of the prompt
asks for, at once, so that its number is a guess after a chain of steps. The thinking comes from the
trio's reasoning model, which knows no tools.
"""
