// Probabilities are computed here, from queries, keys and bias tables: a page of all of them would be many times as long.
//
// Tokens: 0 is [CLS], 1 + row * columns + column a patch.  `place` counts the blocks that the page holds.

class Attention {
  constructor(facts, arrays) {
    [this.rows, this.columns] = facts.grid;
    this.arrays = arrays;
    [, this.heads, this.tokens, this.size] = arrays.query.shape;
    this.hasBias = "table" in arrays;
    this.offsets = {rows: 2 * this.rows - 1, columns: 2 * this.columns - 1};
    this.biasRows = new Map();
    this.biasMaps = new Map();
  }

  /** softmax(q k^T / sqrt(d) + bias) of one query, or without the bias. */
  probabilities(place, head, token, withBias = true) {
    const {query, query_scale, key, key_scale} = this.arrays;
    const {tokens, size} = this, first = (place * this.heads + head) * tokens;
    const q = query.values.subarray((first + token) * size, (first + token + 1) * size);
    const factor = query_scale.values[first + token] / Math.sqrt(size);
    const rows = withBias && this.hasBias ? this.rowsOf(token) : null;
    const scores = new Float32Array(tokens);
    for (let j = 0, at = first * size; j < tokens; j++) {
      let sum = 0;
      for (let c = 0; c < size; c++, at++) sum += q[c] * key.values[at];
      scores[j] = sum * factor * key_scale.values[first + j];
      if (rows) scores[j] += this.bias(place, head, rows[j]);
    }
    return softmax(scores);
  }

  /** The rows of the bias table for a query and every key. */
  rowsOf(query) {
    if (!this.biasRows.has(query)) {
      this.biasRows.set(query, Int32Array.from({length: this.tokens}, (_, key) => this.row(query, key)));
    }
    return this.biasRows.get(query);
  }

  /** The row of the bias table for a query and a key. */
  row(query, key) {
    const last = this.offsets.rows * this.offsets.columns + 2;
    if (query === 0) return key === 0 ? last : last - 2;
    if (key === 0) return last - 1;
    const [y, x] = this.place(query), [v, u] = this.place(key);
    return (y - v + this.rows - 1) * this.offsets.columns + (x - u + this.columns - 1);
  }

  bias(place, head, row) {
    const {table, table_scale} = this.arrays;
    const at = place * this.heads + head;
    return table.values[at * table.shape[2] + row] * table_scale.values[at];
  }

  /** The bias as a map over offsets, key minus query: the middle is the patch itself, right of it what lies to its right. */
  biasMap(place, head) {
    const count = this.offsets.rows * this.offsets.columns, name = `${place} ${head}`;
    if (!this.biasMaps.has(name)) {
      this.biasMaps.set(name, Float32Array.from({length: count}, (_, i) => this.bias(place, head, count - 1 - i)));
    }
    return this.biasMaps.get(name);
  }

  /** The bias of a patch looking at [CLS], of [CLS] looking at a patch, and of [CLS] looking at itself. */
  clsBias(place, head) {
    const last = this.offsets.rows * this.offsets.columns + 2;
    return {toCls: this.bias(place, head, last - 1), fromCls: this.bias(place, head, last - 2),
      itself: this.bias(place, head, last)};
  }

  /** How much of each token of the embeddings is in `token` after a block. */
  rollout(place, token) {
    const {rollout, rollout_scale} = this.arrays;
    const row = place * this.tokens + token, scale = rollout_scale.values[row];
    const bytes = rollout.values.subarray(row * this.tokens, (row + 1) * this.tokens);
    return Float32Array.from(bytes, (byte) => scale * (byte / 255) ** 2);
  }

  /** Row and column of a patch's token. */
  place(token) {
    return [Math.floor((token - 1) / this.columns), (token - 1) % this.columns];
  }
}

function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b));
  const powers = scores.map((x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((x) => x / sum);
}
