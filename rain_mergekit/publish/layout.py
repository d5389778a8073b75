"""The subfolder of a merged model in which its calibration, data and record are kept.

Not beside the weights: some loaders take every safetensors file there for weights.
"""

FOLDER = "rain"
CONFIG = f"{FOLDER}/rain.yml"
REQUEST = f"{FOLDER}/request.json"
CALIBRATION = f"{FOLDER}/calibration.rain.safetensors"
REASONING = f"{FOLDER}/reasoning.jsonl"
INSTRUCTION = f"{FOLDER}/instruction.jsonl"
HELD_OUT = f"{FOLDER}/held-out.jsonl"
REPORT = f"{FOLDER}/report.html"
RECORD = f"{FOLDER}/reproduce.json"
MERGE_CONFIG = "mergekit_config.yml"
CARD = "README.md"
