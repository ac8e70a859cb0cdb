# bash readme_command.sh N: the Nth command of the README (its Nth block ```bash), as written; on Windows, where the
# folder of a virtual environment's programs and the name of Python are others, with these.
set -euo pipefail
cd "$(dirname "$0")/.."
command=$(awk -v n="$1" '/^```bash\r?$/ {k++; on = k == n; next} /^```\r?$/ {on = 0} on' README.md)
if [ "${RUNNER_OS:-}" = Windows ]; then
  command=$(printf '%s' "$command" | sed 's,\.venv/bin/,.venv/Scripts/,g; s,python3 ,python ,g')
fi
printf '%s\n' "$command"
bash -euo pipefail -c "$command"
