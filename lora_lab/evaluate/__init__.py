from lora_lab.evaluate.registration import register_with_lm_eval

register_with_lm_eval()
