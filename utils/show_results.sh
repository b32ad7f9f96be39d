#!/usr/bin/env bash
# Usage: utils/show_results.sh [exp/train_seed1/decode_test ...]
exec python3 "$(dirname "${BASH_SOURCE[0]}")/show_results.py" "$@"
