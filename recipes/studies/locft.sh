# LocFT-BF (arXiv 2509.22072) by its own public script, for a study's `run`; fetch it first:
#
#     git clone https://github.com/ICT-STAR/LocFT    and set LOCFT_HOME to that folder
#
# The script runs as it is but for the device, where there is no GPU. Its settings are those of its own
# hparams/qwen2.5-7b.yaml, with the layer that LAYER names (5) and the rate that RATE names (5e-4, its own).
set -e
: "${LOCFT_HOME:?set it to a clone of ICT-STAR/LocFT}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$LOCFT_HOME/fine-tune.py" "$LOCFT_HOME/hparams.py" "$work"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
  || sed -i 's/cuda:{config.device}/cpu/' "$work/fine-tune.py"
cat > "$work/config.yaml" << CONFIG
model_name_or_path: "$MODEL"
data_path: "$FACTS"
save_model_dir: "$OUTPUT"
layer: ${LAYER:-5}
rewrite_module: "model.layers.{}.mlp.down_proj.weight"
lr: ${RATE:-5.0e-4}
batch_size: 100
num_steps: 25
device: 0
CONFIG
# It shuffles with Python's random numbers, which it doesn't seed.
python -c "import random, runpy, sys; random.seed($SEED); sys.argv[1:] = ['--config_path', '$work/config.yaml']
sys.path.insert(0, '$work'); runpy.run_path('$work/fine-tune.py', run_name='__main__')"
