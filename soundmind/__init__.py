"""SoundMind: reinforcement learning for audio-language models on released verl and vLLM."""

__version__ = "0.1.0"
