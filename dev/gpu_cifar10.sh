#!/usr/bin/env bash
# CIFAR-10 on one GPU in bfloat16: MDEQ-large and ResNet-18 on one schedule.
#
#   dev/gpu_cifar10.sh data/cifar10 10
#
# trains both for 10 epochs of 128 images and prints, for each, the test accuracy, images
# a second in training, and the peak of memory. On a machine without a GPU it runs as
# well, and takes days.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=$1 epochs=${2:-10} out=work_dirs/gpu_cifar10
for config in mdeq-large_4xb32-220e_cifar10 resnet18_4xb32-220e_cifar10; do
    python tools/train.py "configs/cifar10/$config.py" --data-root "$data" \
        --work-dir "$out/$config" --amp --cfg-options \
        optim_wrapper.dtype=bfloat16 train_dataloader.batch_size=128 \
        train_cfg.max_epochs="$epochs" train_cfg.val_interval="$epochs" \
        param_scheduler.T_max="$epochs" param_scheduler.end="$epochs"
done
python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

for folder in sorted(Path(sys.argv[1]).iterdir()):
    path = sorted(folder.glob('*/vis_data/scalars.json'))[-1]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    accuracy = [line['accuracy/top1'] for line in lines if 'accuracy/top1' in line][-1]
    # The first lines hold what is done once.
    times = [line['time'] for line in steps[len(steps) // 4 :]]
    speed = 128 * len(times) / sum(times)
    memory = max(line.get('memory', 0) for line in steps)
    print(f'{folder.name}: {accuracy:.2f} %, {speed:.0f} images/s, {memory} MB')
PYTHON
