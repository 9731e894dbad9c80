"""Speech of Qwen2.5-Omni, frozen: states of the thinker to codec tokens, to sound, to words.

Read first: `talker`. torch and transformers, no verl and no vLLM: training and evaluation use it alike.
"""
