#!/usr/bin/env bash
# Makes one table: every run of it, then the report of their folders.
#
#   scripts/reproduce.sh ablation   quickstart                  0,1,2
#   scripts/reproduce.sh ablation   resnet8_fashion_mnist       0,1,2
#   scripts/reproduce.sh ablation   resnet8_narrow_fashion_mnist 0,1,2
#   scripts/reproduce.sh ablation   resnet20_fashion_mnist      0,1,2
#   scripts/reproduce.sh ablation   resnet20_cifar10            0,1,2
#   scripts/reproduce.sh ablation   resnet18_imagenet           0,1,2 data.root=/data/imagenet
#   scripts/reproduce.sh comparison quickstart                  0,1,2
#   scripts/reproduce.sh taught     resnet8_narrow_fashion_mnist 0,1,2 distillation.model.depth=8
#   scripts/reproduce.sh allocation quickstart                  0,1,2
#   … and so on: the first word is the table, the second any experiment of configs/experiment.
#
# taught adds to the comparison the rows that learn from another float network: ADQ with mixed bits,
# and ADQ, LSQ, N2UQ and PACT at 3 and 4 bits. Its settings say which network
# (configs/distillation/teacher.yaml). Its report has both.
#
# allocation asks what choosing bits is worth after QAT: the optimum by each metric, greedy, uniform and
# five random allocations, all of as many bits as W3A3 has at most, for weights and for inputs.
#
# Further words are settings of every run (trainer.epochs=5, trainer.device=cuda:1 …).
# Stopped? The same command goes on with what is not done. After a failed run the others still
# run, the report names it, and the script ends with an error.
# The float models are trained once, for all tables. On one core of an Intel Xeon (OMP_NUM_THREADS=1, so
# that two sweeps can run side by side) a run of resnet8_narrow_fashion_mnist took 37 s, a taught one 58 s,
# one of resnet8_fashion_mnist 71 s; the float models before them 80 and 165 s a seed. The comparison of
# the narrow network with five seeds, 125 runs at that time, took 84 minutes of one core. The others have not been timed.
#
# Runs for each seed: an ablation has 12, a comparison 28 and taught 10 more, an allocation 12.
set -euo pipefail

usage() { sed -n '2,31s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
table=$1 experiment=$2 seeds=${3:-0,1,2}
shift $(($# < 3 ? $# : 3))
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
[ -x "$bin/adq-train" ] || { echo "$bin/adq-train is missing; run make setup, or set BIN" >&2; exit 2; }

# names GROUP GREP…: the choices of a config group that grep lets through, with commas.
names() { ls "configs/$1" | sed -n 's/\.yaml$//p' | grep "${@:2}" | paste -sd, -; }

# sweep SETTING…: the table's own words come first, so that the folders' names begin with them.
failed=0
sweep() { "$bin/adq-train" -m "$@" "experiment=$experiment" "seed=$seeds" "${more[@]}" || failed=1; }
more=("$@")

folders=("$table")
case $table in
  ablation)
    sweep "ablation=$(names ablation -vx grid)" ;;
  comparison)
    sweep "comparison=$(names comparison -v ^adq_mixed)" budget.average_weight_bits=2,3,4
    sweep "comparison=$(names comparison ^adq_mixed)" budget.average_activation_bits=3,4 ;;
  taught)
    folders=(comparison distillation)
    sweep distillation=teacher comparison=adq,lsq,n2uq,pact budget.average_weight_bits=3,4
    sweep distillation=teacher comparison=adq_mixed_apart budget.average_activation_bits=3,4 ;;
  allocation)
    folders=(sensitivity allocator)
    size=(budget.average_weight_bits=3 budget.average_activation_bits=3)
    sweep "sensitivity=$(names sensitivity -v -e from_file -e learned)" allocator=ilp "${size[@]}"
    sweep allocator=greedy,uniform "${size[@]}"
    sweep allocator=random allocator.seed=0,1,2,3,4 "${size[@]}" ;;
  *) usage ;;
esac

root=outputs
for word in "${more[@]}"; do
  case $word in output_root=*) root=${word#output_root=} ;; esac
done
runs=()
for word in "${folders[@]}"; do runs+=("$root/$experiment/$word"=*); done
"$bin/adq-report" "${runs[@]}" "output=$root/reports/$table-$experiment" || failed=1
exit $failed
