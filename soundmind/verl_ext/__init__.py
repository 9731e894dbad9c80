"""Everything verl 0.9.1 must be told for Qwen2.5-Omni audio. The only package that imports verl.

plugin        what runs at `import verl`: platform and patches, in a SoundMind run only
platform_cpu  a machine without an accelerator, as verl sees it
model         model config: thinker config, processor, banned tokens
engine        FSDP2 engine: build, silent clip for text batches, weight names
agent_loop    prompt and audio -> vLLM -> response, features once per prompt
trainer       V1 sync trainer with reward components in its metrics and dumps
"""
