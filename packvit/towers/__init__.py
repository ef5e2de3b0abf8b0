"""Our encoders in the place of a multimodal model's own vision tower.

model = Qwen3VLForConditionalGeneration.from_pretrained(...)
packvit.replace_tower(model)      # the same inputs and outputs, quicker
packvit.restore_tower(model)      # its own class again, with the weights as they are now
"""
