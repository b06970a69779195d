/* Parses the specifications of ops.def. */
#include "spec.h"

#include <string.h>

static const char *const type_names[PL_T_COUNT] = {
    [PL_T_F32] = "f32",       [PL_T_F64] = "f64",     [PL_T_I32] = "i32",     [PL_T_I64] = "i64",
    [PL_T_U8] = "u8",         [PL_T_ACC] = "acc",     [PL_T_FLOAT] = "float", [PL_T_INT] = "int",
    [PL_T_WEIGHT] = "weight", [PL_T_STACK] = "stack", [PL_T_REAL] = "real",   [PL_T_HALF] = "half",
    [PL_T_ACT] = "act"};

/* The functions below read at *s, move *s past what they read, and return 0 where it is wrong. */

static int read_char(const char **s, char c) {
    if (**s != c) return 0;
    (*s)++;
    return 1;
}

static int is_letter(char c) { return c >= 'A' && c <= 'Z'; }

static int read_letter(const char **s, char *letter) {
    if (!is_letter(**s)) return 0;
    *letter = *(*s)++;
    return 1;
}

static int read_type(const char **s, pl_type *type) {
    const size_t n = strcspn(*s, " [");
    for (int i = 0; i < PL_T_COUNT; i++)
        if (strlen(type_names[i]) == n && !memcmp(type_names[i], *s, n)) {
            *type = (pl_type)i;
            *s += n;
            return 1;
        }
    return 0;
}

static int read_dim(const char **s, pl_dim_spec *d) {
    if (read_char(s, '*')) d->rule = '*';
    if (read_letter(s, &d->letter)) {
        for (int i = 0; read_char(s, '+'); i++) {
            if (!i && read_char(s, '1')) {
                d->rule = '+';
                return 1;
            }
            if (i == 2 || !read_letter(s, &d->more[i])) return 0;
        }
        if (read_char(s, '/')) {
            d->rule = '/';
            return read_char(s, '2');
        }
        return 1;
    }
    if (**s < '0' || **s > '9') return 0;
    d->size = *(*s)++ - '0';
    return 1;
}

static int read_dims(const char **s, pl_param *p) {
    do {
        if (p->ndim == PL_MAX_DIMS || !read_dim(s, &p->dim[p->ndim++])) return 0;
    } while (read_char(s, ','));
    return read_char(s, ']');
}

static int read_param(const char **s, pl_param *p) {
    if (read_char(s, '=')) {
        p->in_place = 1;
        p->in_place_on_devices = !read_char(s, '~');
    }
    p->updated = read_char(s, '+');
    const size_t n = strcspn(*s, "?:");
    if (n == 0 || n >= sizeof p->name) return 0;
    memcpy(p->name, *s, n);
    *s += n;
    p->optional = read_char(s, '?');
    if (!read_char(s, ':') || !read_type(s, &p->type)) return 0;
    if (read_char(s, '[') && !read_dims(s, p)) return 0;
    if (read_char(s, '<')) {
        if (!read_letter(s, &p->index_limit)) return 0;
        p->index_ignored = read_char(s, '~');
    }
    if (read_char(s, '^')) {
        if (!read_letter(s, &p->offsets_end)) return 0;
        p->offsets_may_stop = read_char(s, '~');
    }
    return **s == ' ' || !**s;
}

const char *pl_spec_parse(pl_spec *spec, const char *name, const char *text) {
    memset(spec, 0, sizeof *spec);
    spec->name = name;
    spec->text = text;
    int output = 0;
    const char *s = text;
    while (*s) {
        if (read_char(&s, ' ')) continue;
        if (read_char(&s, '>')) {
            output = 1;
        } else if (is_letter(s[0]) && s[1] == '%' && is_letter(s[2])) {
            if (spec->constraints == PL_MAX_CONSTRAINTS) return s;
            spec->constraint[spec->constraints].multiple = s[0];
            spec->constraint[spec->constraints++].divisor = s[2];
            s += 3;
        } else if (s[0] == '2' && is_letter(s[1]) && s[2] == '<' && s[3] == '=' &&
                   is_letter(s[4])) {
            if (spec->constraints == PL_MAX_CONSTRAINTS) return s;
            spec->constraint[spec->constraints].multiple = s[4];
            spec->constraint[spec->constraints].divisor = s[1];
            spec->constraint[spec->constraints++].twice = 1;
            s += 5;
        } else {
            if (spec->count == PL_MAX_ARGS) return s;
            pl_param *p = &spec->param[spec->count++];
            p->output = output;
            if (!read_param(&s, p)) return s;
        }
    }
    return NULL;
}
