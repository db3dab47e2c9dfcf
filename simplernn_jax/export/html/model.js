"use strict";
// A SimpleRNN language model: decoding one token at a time, and its tokenizer. No browser needed.
// Weights are float32 arrays under the names of model.safetensors; matrices are [out, in] by row.

const NORM_EPSILON = 1e-6;
const ROTARY_BASE = 10000;

class LanguageModel {
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    const { hidden_dim: D, key_dim: K, value_dim: V, mlp_dim: M, vocab_size } = config;
    const sizes = { x: D, n: D, y: D, q: K, k: K, g: K, v: V, o: V, r: V, mlp: M, logits: vocab_size };
    this.buffers = {};  // reused by every token
    for (const [name, size] of Object.entries(sizes)) this.buffers[name] = new Float64Array(size);
    this.isPlain = config.block === "plain";
  }

  // The state before the first token: plain objects of typed arrays.
  initialState() {
    const { hidden_dim: D, key_dim: K, value_dim: V, num_heads: H, attention_context: S } = this.config;
    const layers = this.config.mixers.map((mixer) => {
      const layer = {};
      if (!this.isPlain) layer.recent = [1, 2, 3].map(() => new Float64Array(D));  // newest first
      if (mixer === "attention") {
        layer.keys = new Float32Array(S * K);    // a ring of S tokens
        layer.values = new Float32Array(S * V);
      } else {
        layer.state = new Float32Array(K * V / H);
      }
      return layer;
    });
    return { layers, length: 0 };
  }

  // Process one token: changes `state`, returns the logits of the next token (a reused array).
  step(state, token) {
    const { hidden_dim: D, tie_embeddings } = this.config;
    const { x, n, logits } = this.buffers;
    const embedding = this.weights["embedding.weight"];
    const scale = this.isPlain ? 1 : Math.sqrt(D);
    for (let i = 0; i < D; i++) x[i] = embedding[token * D + i] * scale;
    state.layers.forEach((layer, index) => this.layer(`layers.${index}.`, layer, state.length, index));
    state.length += 1;
    if (this.isPlain) {
      this.linear("lm_head", x, logits);
      return logits;
    }
    normalize(x, n, 0, D);
    const norm = this.weights["final_norm.weight"];
    for (let i = 0; i < D; i++) n[i] *= norm[i];
    if (tie_embeddings) multiply(embedding, n, logits);
    else this.linear("lm_head", n, logits);
    return logits;
  }

  layer(name, layer, position, index) {
    const { hidden_dim: D, num_heads: H, value_dim: V } = this.config;
    const { x, n, y, q, k, v, g, o, r, mlp } = this.buffers;
    const input = this.isPlain ? x : y;
    if (!this.isPlain) this.convolve(name, layer);
    this.linear(name + "query_proj", input, q);
    this.linear(name + "key_proj", input, k);
    this.linear(name + "value_proj", input, v);
    if (this.config.mixers[index] === "attention") {
      this.attend(layer, position);
    } else {
      this.linear(name + "gate_proj", input, g);
      this.recur(layer.state);
    }
    if (this.isPlain) {
      this.linear(name + "out_proj", o, x);
      return;
    }
    this.linear(name + "output_gate_proj", y, r);
    for (let h = 0; h < H; h++) normalize(o, o, h * V / H, (h + 1) * V / H);
    for (let i = 0; i < V; i++) o[i] *= r[i] * sigmoid(r[i]);
    this.linear(name + "out_proj", o, n);
    for (let i = 0; i < D; i++) x[i] += n[i];
    if (this.config.block !== "parallel") normalize(x, y, 0, D);
    this.linear(name + "mlp_in", y, mlp);
    for (let i = 0; i < mlp.length; i++) mlp[i] = mlp[i] > 0 ? mlp[i] * mlp[i] : 0;
    this.linear(name + "mlp_out", mlp, n);
    for (let i = 0; i < D; i++) x[i] += n[i];
  }

  // y = sum over n of weight[:, n] * norm(x) n tokens earlier
  convolve(name, layer) {
    const { x, y } = this.buffers, D = x.length;
    const weight = this.weights[name + "convolution.weight"];
    const now = layer.recent.pop();
    const width = layer.recent.length + 2;
    const oldest = now.slice();
    normalize(x, now, 0, D);
    for (let i = 0; i < D; i++) {
      let sum = weight[i * width] * now[i] + weight[i * width + width - 1] * oldest[i];
      for (let t = 0; t < width - 2; t++) sum += weight[i * width + t + 1] * layer.recent[t][i];
      y[i] = sum;
    }
    layer.recent.unshift(now);
  }

  // S = diag(g) S + k v^T; o = S^T q, for each head
  recur(state) {
    const { num_heads: H } = this.config, { q, k, v, g, o } = this.buffers;
    const K = q.length / H, V = v.length / H, scale = this.isPlain ? 1 : 1 / Math.sqrt(K);
    o.fill(0);
    for (let i = 0; i < q.length; i++) {
      const key = sigmoid(k[i]), gate = sigmoid(g[i]), query = q[i] * scale;
      const first = Math.floor(i / K) * V;
      for (let j = 0; j < V; j++) {
        const s = state[i * V + j] * gate + key * v[first + j];
        state[i * V + j] = s;
        o[first + j] += s * query;
      }
    }
  }

  // Softmax attention over the last tokens, with rotary position embedding.
  attend(layer, position) {
    const { num_heads: H, attention_context: S } = this.config, { q, k, v, o } = this.buffers;
    const K = q.length / H, V = v.length / H, half = K / 2;
    for (const x of [q, k]) {
      for (let i = 0; i < half; i++) {
        // Whole units of 2^-32 turns: exact at any position.
        const turns = Math.round(ROTARY_BASE ** (-i / half) / (2 * Math.PI) * 2 ** 32);
        const angle = Math.imul(position, turns) * (2 * Math.PI / 2 ** 32);
        const cos = Math.cos(angle), sin = Math.sin(angle);
        for (let h = 0; h < H; h++) {
          const a = x[h * K + i], b = x[h * K + half + i];
          x[h * K + i] = a * cos - b * sin;
          x[h * K + half + i] = b * cos + a * sin;
        }
      }
    }
    layer.keys.set(k, (position % S) * k.length);
    layer.values.set(v, (position % S) * v.length);
    const count = Math.min(position + 1, S);
    const scores = new Float64Array(count);
    o.fill(0);
    for (let h = 0; h < H; h++) {
      for (let s = 0; s < count; s++) {
        let sum = 0;
        for (let i = 0; i < K; i++) sum += q[h * K + i] * layer.keys[s * k.length + h * K + i];
        scores[s] = sum / Math.sqrt(K);
      }
      const total = softmax(scores);
      for (let s = 0; s < count; s++) {
        const weight = scores[s] / total;
        for (let j = 0; j < V; j++) o[h * V + j] += weight * layer.values[s * v.length + h * V + j];
      }
    }
  }

  linear(name, input, output) {
    multiply(this.weights[name + ".weight"], input, output);
    const bias = this.weights[name + ".bias"];
    if (bias) for (let i = 0; i < output.length; i++) output[i] += bias[i];
  }
}

// output = matrix [out, in] times input, four rows at a time
function multiply(matrix, input, output) {
  const columns = input.length, rows = output.length;
  let row = 0;
  for (; row + 4 <= rows; row += 4) {
    let a = 0, b = 0, c = 0, d = 0;
    let at0 = row * columns, at1 = at0 + columns, at2 = at1 + columns, at3 = at2 + columns;
    for (let i = 0; i < columns; i++) {
      const x = input[i];
      a += matrix[at0 + i] * x;
      b += matrix[at1 + i] * x;
      c += matrix[at2 + i] * x;
      d += matrix[at3 + i] * x;
    }
    output[row] = a;
    output[row + 1] = b;
    output[row + 2] = c;
    output[row + 3] = d;
  }
  for (; row < rows; row++) {
    let a = 0;
    for (let i = 0; i < columns; i++) a += matrix[row * columns + i] * input[i];
    output[row] = a;
  }
}

// Scale input[from..to] to a root mean square of 1, into the same places of output.
function normalize(input, output, from, to) {
  let sum = 0;
  for (let i = from; i < to; i++) sum += input[i] * input[i];
  const scale = 1 / Math.sqrt(sum / (to - from) + NORM_EPSILON);
  for (let i = from; i < to; i++) output[i] = input[i] * scale;
}

function sigmoid(x) {
  return 1 / (1 + Math.exp(-x));
}

// Replace values by their exponentials, the largest being 1; return the sum.
function softmax(values) {
  let largest = -Infinity, total = 0;
  for (const value of values) if (value > largest) largest = value;
  for (let i = 0; i < values.length; i++) total += values[i] = Math.exp(values[i] - largest);
  return total;
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// Draw an id from softmax(logits / temperature), as the argmax with Gumbel noise; 0 is the likeliest
// one. Never one of `banned`.
function sample(logits, temperature, banned) {
  const scores = Float64Array.from(logits, (x) => (
    temperature > 0 ? x - temperature * Math.log(-Math.log(Math.random())) : x));
  for (const id of banned) scores[id] = -Infinity;
  return argmax(scores);
}

// The likeliest ids and their probabilities; of equal ones the smaller id first.
function likeliest(logits, count) {
  const probabilities = Float64Array.from(logits);
  const total = softmax(probabilities);
  return Array.from({ length: Math.min(count, logits.length) }, () => {
    const id = argmax(probabilities), probability = probabilities[id] / total;
    probabilities[id] = -1;
    return [id, probability];
  });
}

// Text to ids, by byte-level BPE. Bytes are a string of a character for each.
class Tokenizer {
  constructor({ bytes, merges, pattern, whole_words }) {
    this.bytes = bytes.map((text) => Uint8Array.from(text, (byte) => byte.charCodeAt(0)));
    this.ids = new Map(bytes.map((text, id) => [text, id]));
    this.ranks = new Map(merges.map(([a, b], rank) => [bytes[a] + BETWEEN + bytes[b], rank]));
    this.pattern = pattern && new RegExp(pattern, "gu");
    this.hasWholeWords = whole_words;
  }

  encode(text) {
    return this.words(text).flatMap((word) => this.merge(word));
  }

  // Matches of the pattern, and what lies between them.
  words(text) {
    if (!this.pattern) return [text];
    const words = [];
    let at = 0;
    for (const match of text.matchAll(this.pattern)) {
      words.push(text.slice(at, match.index), match[0]);
      at = match.index + match[0].length;
    }
    return [...words, text.slice(at)].filter((word) => word);
  }

  // Join the pair of lowest rank until none is left.
  merge(word) {
    const bytes = unescape(encodeURIComponent(word));  // not every engine has TextEncoder
    if (this.hasWholeWords && this.ids.has(bytes)) return [this.ids.get(bytes)];
    const parts = [...bytes];
    for (;;) {
      let best = -1, lowest = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + BETWEEN + parts[i + 1]);
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    const unknown = parts.some((part) => !this.ids.has(part));
    if (unknown) throw new Error(`${JSON.stringify(word)} is not known to this model`);
    return parts.map((part) => this.ids.get(part));
  }
}

const BETWEEN = "\u0100";  // no byte

function fromBase64(text) {
  // Older browsers have only atob; V8 without a browser has only the other.
  return Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (byte) => byte.charCodeAt(0));
}

// Arrays by name, as float32.
function decodeWeights(encoded) {
  const weights = {};
  for (const [name, { type, arrays: [values, scales] }] of Object.entries(encoded)) {
    const bytes = fromBase64(values).buffer;
    if (type === "float32") weights[name] = new Float32Array(bytes);
    else if (type === "float16") weights[name] = fromHalf(new Uint16Array(bytes));
    else {
      const rows = new Float32Array(fromBase64(scales).buffer), columns = bytes.byteLength / rows.length;
      weights[name] = Float32Array.from(new Int8Array(bytes), (x, i) => x * rows[Math.floor(i / columns)]);
    }
  }
  return weights;
}

function fromHalf(halves) {
  return Float32Array.from(halves, (bits) => {
    const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
}
