// Products by the tiles of AMX: up to 16 rows times the 64 outputs of a panel. Only for linear.cpp to include.
//
// A slot of a panel is a row of an AMX tile as it lies in memory: 16 lanes of 32 bits, each the inputs of one output.
// Tiles 0 to 3 hold the sums of a panel, 4 rows of x, 5 slots of the panel; 6 and 7 are the same for the slots that are
// left over after whole tiles. Sums of codes are exact, so a row comes out bitwise as without tiles. Sums of bfloat16
// are not, so at this level every row goes through tiles, alone or not, and depends on no other.
// No machine with AMX runs the tests: they compile this file with a model of the tiles in plain C++ (QUIRE_AMX_MODEL).

#if (defined(__AMX_INT8__) && defined(__AMX_BF16__)) || defined(QUIRE_AMX_MODEL)
#define QUIRE_HAS_AMX 1
#endif

template <class Kind, class T>
struct Chunks {
  static void run(const LinearArgs& a, const Prepared& p, int64_t row, int64_t end, int64_t panel) {
    panel_of_chunk<Kind, T>(a, p, row, end, panel);
  }
};

#if defined(QUIRE_HAS_AMX)
constexpr int64_t AMX_ROWS = 16, AMX_SLOTS = 16;
constexpr int64_t AMX_LEAST = 8;  // rows from which codes go through tiles

// What LDTILECFG reads. Source: Intel SDM, volume 1, chapter 18, "palette 1".
struct alignas(64) AmxShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

static inline void set_shape(int64_t rows, int64_t tail) {
  AmxShape shape;
  for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = uint8_t(i == 5 ? AMX_SLOTS : rows);
  shape.bytes[6] = uint16_t(tail ? tail * 4 : 64);
  shape.rows[7] = uint8_t(tail ? tail : AMX_SLOTS);
  _tile_loadconfig(&shape);
}

struct AmxSums {
  static inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static inline void keep(void* out) {  // [rows, PANEL], of 32 bits
    char* to = static_cast<char*>(out);
    _tile_stored(0, to, PANEL * 4);
    _tile_stored(1, to + 64, PANEL * 4);
    _tile_stored(2, to + 128, PANEL * 4);
    _tile_stored(3, to + 192, PANEL * 4);
  }
};

// Activations are signed and codes are not.
#define QUIRE_AMX_STEP(DOT, X, SLOTS)         \
  _tile_loadd(X, x, stride);                  \
  _tile_loadd(SLOTS, at, PANEL * 4);          \
  DOT(0, X, SLOTS);                           \
  _tile_loadd(SLOTS, at + 64, PANEL * 4);     \
  DOT(1, X, SLOTS);                           \
  _tile_loadd(SLOTS, at + 128, PANEL * 4);    \
  DOT(2, X, SLOTS);                           \
  _tile_loadd(SLOTS, at + 192, PANEL * 4);    \
  DOT(3, X, SLOTS);

static inline void step_codes(const char* x, int64_t stride, const char* at, bool is_tail) {
  if (is_tail) {
    QUIRE_AMX_STEP(_tile_dpbsud, 6, 7)
  } else {
    QUIRE_AMX_STEP(_tile_dpbsud, 4, 5)
  }
}

static inline void step_pairs(const char* x, int64_t stride, const char* at, bool is_tail) {
  if (is_tail) {
    QUIRE_AMX_STEP(_tile_dpbf16ps, 6, 7)
  } else {
    QUIRE_AMX_STEP(_tile_dpbf16ps, 4, 5)
  }
}
#undef QUIRE_AMX_STEP

// `count` slots of 8 bits out of half as many of 4: at most a tile.
static inline void spread_slots(const uint32_t* lanes, int64_t count, uint32_t* out) {
  for (int64_t slot = 0; slot < count; ++slot)
    for (int64_t n = 0; n < PANEL; ++n)
      out[slot * PANEL + n] = lanes[slot / 2 * PANEL + n] >> (slot % 2 * 4) & 0x0f0f0f0fu;
}

template <Format F, class T>
struct Chunks<Codes<F>, T> {
  static constexpr int64_t HALVES = F == Format::u4 ? 2 : 1;

  static void run(const LinearArgs& a, const Prepared& p, int64_t row, int64_t end, int64_t panel) {
    const LinearWeights& w = *a.weights;
    const int64_t slots = w.num_slots / w.num_groups * HALVES;
    int64_t rows = 0;
    for (; end - row >= AMX_LEAST; row += rows) {
      if (rows != (end - row < AMX_ROWS ? end - row : AMX_ROWS)) {
        rows = end - row < AMX_ROWS ? end - row : AMX_ROWS;
        set_shape(rows, slots % AMX_SLOTS);
      }
      block(a, p, row, rows, panel, slots);
    }
    if (rows) _tile_release();
    if (row < end) panel_of_chunk<Codes<F>, T>(a, p, row, end, panel);
  }

 private:
  static void block(const LinearArgs& a, const Prepared& p, int64_t row, int64_t rows, int64_t panel, int64_t slots) {
    const LinearWeights& w = *a.weights;
    alignas(64) vf sums[AMX_ROWS][1][VECS_OF_PANEL] = {};
    alignas(64) int32_t dots[AMX_ROWS * PANEL];
    const uint32_t* lanes = w.lanes + panel * w.num_slots * PANEL;
    const uint32_t* x = static_cast<const uint32_t*>(p.rows) + row * p.stride;
    for (int64_t g = 0; g < w.num_groups; ++g, lanes += slots / HALVES * PANEL, x += slots) {
      multiply_group(lanes, x, p.stride * 4, slots);
      AmxSums::keep(dots);
      for (int64_t m = 0; m < rows; ++m) scale_row(w, p, row + m, panel, g, dots + m * PANEL, sums[m][0]);
    }
    for (int64_t m = 0; m < rows; ++m) write_tile<T, 1, VECS_OF_PANEL>(a, row + m, panel * PANEL, sums[m]);
  }

  static void multiply_group(const uint32_t* lanes, const uint32_t* x, int64_t stride, int64_t slots) {
    alignas(64) uint32_t spread[AMX_SLOTS * PANEL];
    AmxSums::clear();
    for (int64_t slot = 0; slot < slots; slot += AMX_SLOTS) {
      const int64_t count = slots - slot < AMX_SLOTS ? slots - slot : AMX_SLOTS;
      const uint32_t* at = lanes + slot / HALVES * PANEL;
      if constexpr (F == Format::u4) {
        spread_slots(at, count, spread);
        at = spread;
      }
      step_codes(reinterpret_cast<const char*>(x + slot), stride, reinterpret_cast<const char*>(at), count < AMX_SLOTS);
    }
  }

  // The same sums in the same order as Codes::tile.
  static void scale_row(const LinearWeights& w, const Prepared& p, int64_t row, int64_t panel, int64_t g,
                        const int32_t* dots, vf (&sums)[VECS_OF_PANEL]) {
    const vf scale_of_x = splat(p.scales[row * p.groups_of_x + (p.groups_of_x == 1 ? 0 : g)]);
    const vi total = splat_int(p.totals[row * w.num_groups + g]);
    for (int v = 0; v < VECS_OF_PANEL; ++v) {
      const int64_t index = (panel * w.num_groups + g) * PANEL + v * W;
      const vi dot = (vi)load_lanes(reinterpret_cast<const uint32_t*>(dots + v * W)) - load_zeros(w, index) * total;
      sums[v] += __builtin_convertvector(dot, vf) * (load_scales(w, index) * scale_of_x);
    }
  }
};

template <class T>
struct Chunks<Pairs, T> {
  static void run(const LinearArgs& a, const Prepared& p, int64_t row, int64_t end, int64_t panel) {
    const int64_t slots = a.weights->num_slots;
    const uint32_t* lanes = a.weights->lanes + panel * slots * PANEL;
    for (int64_t rows = 0; row < end; row += rows) {
      rows = end - row < AMX_ROWS ? end - row : AMX_ROWS;
      set_shape(rows, slots % AMX_SLOTS);
      const uint32_t* x = static_cast<const uint32_t*>(p.rows) + row * p.stride;
      AmxSums::clear();
      for (int64_t slot = 0; slot < slots; slot += AMX_SLOTS)
        step_pairs(reinterpret_cast<const char*>(x + slot), p.stride * 4,
                   reinterpret_cast<const char*>(lanes + slot * PANEL), slots - slot < AMX_SLOTS);
      write(a, row, rows, panel);
    }
    _tile_release();
  }

 private:
  static void write(const LinearArgs& a, int64_t row, int64_t rows, int64_t panel) {
    alignas(64) float kept[AMX_ROWS * PANEL];
    AmxSums::keep(kept);
    for (int64_t m = 0; m < rows; ++m) {
      vf sums[1][VECS_OF_PANEL];
      for (int v = 0; v < VECS_OF_PANEL; ++v) sums[0][v] = load(kept + m * PANEL + v * W);
      write_tile<T, 1, VECS_OF_PANEL>(a, row + m, panel * PANEL, sums);
    }
  }
};
#endif
