#!/usr/bin/env bash
# The pipeline as jobs that follow each other, each on as many nodes as its stages need:
#
#   docker/slurm/submit.sh STAGE[,STAGE ...]:NODES ... -- [KEY=VALUE ...]
#
#   docker/slurm/submit.sh sft_teacher:8 sft_student:1 dpo_positive,dpo_negative:8 score:2 ctpd:1 -- \
#       experiment=qwen2.5-72b_to_llama3.1-8b run_dir=runs/72b trainer.checkpoint_every=100
#
# A stage with a hyphen is a variant, ctpd-random of ctpd (ctpd_nemo/pipeline/recipe.py).
#
# A job waits for the jobs that make what its stages build on, and begins when they have succeeded; others run side by
# side. What no job here makes must be complete in run_dir.
#
#   CTPD_IMAGE    a container image for Pyxis; without it the jobs run in this checkout's own environment
#   CTPD_MOUNTS   folders the container sees, as Pyxis takes them; else the folder this is called in
#   CTPD_RETRIES  how often a job goes back into the queue after failures, each time only if it got on in that turn: 3
#                 unless set, 0 for never. It looks for new checkpoints and shards in run_dir, so that must be the same
#                 path outside a container. Not given here, it is that of this checkout's conf/experiment.
#
# Account, partition and time limit are Slurm's own variables: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, ...
# Jobs are asked to stop 15 minutes before their time is up.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

refuse() { # place, found, expected
    echo "error: $1: found $2; expected $3" >&2
    exit 2
}

# What a stage builds on (ctpd_nemo/pipeline/recipe.py).
declare -A builds_on=(
    [sft_teacher]=""
    [sft_student]=""
    [dpo_positive]="sft_teacher"
    [dpo_negative]="sft_teacher"
    [dpo_student_positive]="sft_student"
    [dpo_student_negative]="sft_student"
    [score]="sft_student sft_teacher dpo_positive dpo_negative"
    [score_student]="sft_student sft_teacher dpo_student_positive dpo_student_negative"
    [dpo_student]="sft_student"
    [tis_dpo]="sft_student dpo_student_positive dpo_student_negative"
    [uld]="sft_student sft_teacher score"
    [dskd]="sft_student sft_teacher"
    [multilevel_ot]="sft_student sft_teacher score"
    [ctpd]="sft_student sft_teacher score score_student"
)
# Of a variant too; as its values may name variants of what it builds on, it waits for all of those before it.
sources_of() { # stage, the stages of the chain
    local base
    for base in ${builds_on[${1%%-*}]}; do
        local other
        for other in "${@:2}"; do
            [[ ${other%%-*} != "$base" ]] || echo "$other"
        done
    done
}
known="sft_teacher, sft_student, dpo_positive, dpo_negative, dpo_student_positive, dpo_student_negative, score,"
readonly known+=" score_student, dpo_student, tis_dpo, uld, dskd, multilevel_ot or ctpd"

jobs=()
while (($#)) && [[ $1 != -- ]]; do
    jobs+=("$1")
    shift
done
((${#jobs[@]})) || refuse "command line" "no stages" "STAGE[,STAGE ...]:NODES ... -- [KEY=VALUE ...]"
shift || true # the --, where there is one

# Everything is looked at before anything is submitted.
[[ ${CTPD_RETRIES:-3} =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse CTPD_RETRIES "$CTPD_RETRIES" "a number of times"
readonly name='[a-z_]+(-[a-z0-9_]+)?'
declare -A stands=() # stage -> place of its job on the command line, from 1
for index in "${!jobs[@]}"; do
    job=${jobs[index]}
    [[ $job =~ ^$name(,$name)*:[1-9][0-9]*$ ]] || refuse "$job" "no such form" "STAGE[,STAGE ...]:NODES"
    IFS=, read -ra stages <<<"${job%:*}"
    for stage in "${stages[@]}"; do
        [[ -v builds_on[${stage%%-*}] ]] || refuse "$job" "stage '$stage'" "$known"
        [[ ! -v stands[$stage] ]] || refuse "$job" "$stage a second time" "each stage once"
        stands[$stage]=$((index + 1))
    done
done
for stage in "${!stands[@]}"; do
    for source in $(sources_of "$stage" "${!stands[@]}"); do
        if ((stands[$source] > stands[$stage])) && [[ $source != *-* ]]; then
            refuse "$stage" "before $source" "the stages in the order they build on each other"
        fi
    done
done

# Not by --export, which would cut a path at a comma.
export CTPD_ROOT=$root
declare -A made_by=() # stage -> number of its job
for job in "${jobs[@]}"; do
    IFS=, read -ra stages <<<"${job%:*}"
    waits=()
    for stage in "${stages[@]}"; do
        for source in $(sources_of "$stage" "${!made_by[@]}"); do
            if [[ " ${waits[*]} " != *" ${made_by[$source]} "* ]]; then
                waits+=("${made_by[$source]}")
            fi
        done
    done
    options=("--nodes=${job#*:}" "--job-name=ctpd-${stages[0]}" --export=ALL)
    if ((${#waits[@]})); then
        # A job whose turn can no longer come leaves the queue.
        options+=("--dependency=$(IFS=: && echo "afterok:${waits[*]}")" --kill-on-invalid-dep=yes)
    fi
    number=$(sbatch --parsable "${options[@]}" "$root/docker/slurm/stages.sbatch" "$@" "only=[${job%:*}]")
    number=${number%%;*} # the name of the cluster may follow
    for stage in "${stages[@]}"; do
        made_by[$stage]=$number
    done
    echo "$number  ${job%:*}  nodes ${job#*:}${waits:+  after ${waits[*]}}"
done
