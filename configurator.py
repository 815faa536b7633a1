"""
Turns a script's own top-level variables into its command line, as nanoGPT does:

    python train.py config/smol_360m.py --batch_size=64 --dry_run

In the script, plain assignments with a trailing comment, and then one call:

    batch_size = 32       # sequences in a micro-batch (>= 1)
    schedule = "wsd"      # 'wsd' (stable, then down) | 'cosine' | 'constant'
    setup = configure(globals())

A key's comment is its schema. Quoted values joined by | are all that a string may be; 'cuda:...'
allows whatever begins with cuda:. Bounds in brackets, such as (> 0) or (>= 0, < 1), hold for a
number. Any other comment is free text, also a list with an alternative that is not quoted.
`--help` prints every key with its default and its comment, and configure() checks what it prints.

Config files are Python and apply in the order given; command-line options override them.
"""

import ast
import atexit
import contextlib
import difflib
import errno
import math
import operator
import os
import re
import shlex
import sys
import tokenize
import types
import warnings


class UserError(ValueError):
    """A mistake that the user can correct; printed as one line, without a traceback."""


def counted(count, noun):
    """1, "document" -> "1 document"; 1200, "document" -> "1,200 documents"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def configure(variables, words=False, also="", argv=None):
    """Applies config files and --key=value arguments to `variables`, the globals() of a script.

    The keys are the script's lower-case top-level variables that hold a constant, assigned before
    its first function, class or call of configure(). `also` names sources, with spaces between
    them, whose keys the script has, too: other scripts ("train.py"), or the fields of a dataclass
    ("model.py:GPTConfig"). A word on the command line that is neither an option nor a .py file is
    an error unless `words` is true.

    Returns a namespace: `keys` (their names), `config` (key -> value), `given` (key -> a config
    file's path or "command line"; a key with its default is absent), `files` (the config files),
    `from_files` (key -> value, as set by config files), `words`, and `check(key, value)`, which
    returns a value that did not come through configure(), or raises UserError.
    Raises UserError, which from here on is printed as one line, see `_print_exception`.
    """
    argv = sys.argv[1:] if argv is None else argv
    sys.excepthook, warnings.showwarning = _print_exception, _print_warning
    _prepare_streams()
    keys = _keys_of_script(variables, also.split())
    if "--help" in argv or "-h" in argv:
        print(_help(variables["__doc__"] or "", keys), flush=True)
        sys.exit(0)
    for key in keys.values():
        key.check(key.default, key.place)

    files, options, words = _read_arguments(argv, keys, words)
    given, from_files = {}, {}
    for path in files:
        for name, value in _run_config(path, {name: variables[name] for name in keys}).items():
            variables[name] = from_files[name] = keys[name].check(value, path)
            given[name] = path
    variables |= options
    given |= dict.fromkeys(options, "command line")
    return types.SimpleNamespace(
        keys=list(keys),
        config={name: variables[name] for name in keys},
        given=given,
        files=files,
        from_files=from_files,
        words=words,
        check=lambda name, value: keys[name].check(value),
    )


def _keys_of_script(variables, also):
    """name -> Key of the script and of the sources in `also`, whose defaults become variables."""
    script = variables["__file__"]
    keys = read_keys(script)
    own = set(keys)
    for source in also:
        path, _, class_name = source.partition(":")
        path = os.path.join(os.path.dirname(os.path.abspath(script)), path)
        for name, key in read_keys(path, class_name).items():
            if name not in keys:
                keys[name] = key
    for name in keys.keys() - own:
        if name in variables:
            place = keys[name].place
            raise UserError(f"{place}: {script} has another use for {name}; rename the key")
        variables[name] = keys[name].default
    return keys


# -----------------------------------------------------------------------------
# arguments


def _read_arguments(argv, keys, words_allowed):
    """(config files, key -> value, words) of the command line. Where it is wrong and the line that
    was meant is clear, UserError tells that line."""
    try:
        return _parse_arguments(argv, keys, words_allowed)
    except UserError as e:
        meant, trouble = _arguments_as_meant(argv, keys, words_allowed), str(e)
        with contextlib.suppress(UserError):
            _parse_arguments(meant, keys, words_allowed)
            trouble += f"; did you mean: {command_line([sys.argv[0], *meant])}"
        raise UserError(trouble) from None


def _parse_arguments(argv, keys, words_allowed):
    files, options, words = [], {}, []
    for arg in argv:
        name, equals, text = arg[2:].partition("=")
        if arg.endswith(".py") and not arg.startswith("--"):
            if not os.path.exists(arg):
                raise UserError(f"{arg}: no such config file")
            files.append(arg)
        elif words_allowed and not arg.startswith("-"):
            words.append(arg)
        elif not arg.startswith("--"):
            raise UserError(f"{arg!r} is neither a config file (*.py) nor an option (--key=value)")
        elif name not in keys:
            hint = _nearest(name, keys)
            raise UserError(f"--{name}: there is no such key{hint}; --help lists all keys")
        elif not equals and type(keys[name].default) is not bool:
            raise UserError(f"--{name}: expected a value, as in --{name}={keys[name].default}")
        else:
            options[name] = keys[name].parse(text if equals else "true")
    return files, options, words


def _arguments_as_meant(argv, keys, words_allowed):
    """The arguments with the usual slips corrected: --key VALUE, key=value, --some-key=value, and
    a config behind --config, without its directory or .py, or with a letter wrong."""
    meant, open_key = [], ""  # open_key: it may take the next argument as its value
    for arg in filter(None, (re.sub("^--?config(=|$)", "", arg) for arg in argv)):
        name, equals, text = arg.lstrip("-").partition("=")
        name = name.replace("-", "_")
        is_truth, before = arg.lower() in ("true", "false"), keys.get(open_key)
        if before and not arg.startswith("--") and is_truth == (type(before.default) is bool):
            meant[-1] += f"={arg}"
            open_key = ""
        elif name in keys and (equals or arg.startswith("-")):
            meant.append(f"--{name}{equals}{text}")
            open_key = "" if equals else name
        else:
            is_config = not words_allowed and not arg.startswith("-")
            meant.append(_config_file(arg) if is_config else arg)
            open_key = ""
    return meant


def _config_file(arg):
    """The config file that was meant by `arg`; `arg` itself if there is none like it."""
    stem = arg.removesuffix(".py")
    for directory in ("", "config"):
        path = os.path.join(directory, f"{stem}.py")
        if os.path.isfile(path):
            return path
    directory = os.path.dirname(arg) or "config"
    names = os.listdir(directory) if os.path.isdir(directory) else []
    stems = [name.removesuffix(".py") for name in names if name.endswith(".py")]
    # at 0.6, as for keys, nope would be taken for nanogpt or smol
    close = difflib.get_close_matches(os.path.basename(stem).lower(), stems, n=1, cutoff=0.75)
    return os.path.join(directory, f"{close[0]}.py") if close else arg


def command_line(arguments):
    """How a script is started with these arguments, as one types it; the script is the first."""
    head = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        head = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return shlex.join([*head, *arguments])


# -----------------------------------------------------------------------------
# keys and their schema

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
QUOTED = re.compile(r"""(?<!\w)(?:'([^']*)'|"([^"]*)")(?!\w)""")
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?:\*\*\d+)?"  # 1, 0.5, 1e-3, 2**62
BOUND = re.compile(rf"(>=|<=|>|<)\s*({NUMBER})")
BOUNDS = re.compile(rf"\({BOUND.pattern}(?:,\s*{BOUND.pattern})*\)")
COMPARE = {
    ">=": ("at least", operator.ge),
    ">": ("more than", operator.gt),
    "<=": ("at most", operator.le),
    "<": ("less than", operator.lt),
}


# access tokens of the Hub and of RunPod: a config is printed, logged, and kept in checkpoints
TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{24,}|rpa_[A-Za-z0-9]{24,})")


class Key:
    """A key: its default, its comment, which holds the schema, and where it stands in a source."""

    def __init__(self, name, default, comment, heading, title, line):
        self.name, self.default, self.comment = name, default, comment
        self.heading, self.title, self.place = heading, title, f"{title}, line {line}"
        self.choices, self.bounds = [], []
        if type(default) is str:
            self.choices = _choices(comment)
        elif type(default) is not bool:
            self.bounds = [b for match in BOUNDS.finditer(comment) for b in BOUND.findall(match[0])]

    def parse(self, text):
        """The value of --key=text. A string is taken as it stands: --start=007 is not a number."""
        value = text
        if type(self.default) is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif type(self.default) is not str:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                if re.fullmatch("[+-]?(nan|inf)", text.lower()):
                    value = float(text)
        return self.check(value)

    def check(self, value, place=""):
        """`value` with the type of the default, or UserError; `place` is where it was set."""
        kind = type(self.default)
        if isinstance(value, str) and TOKEN.search(value):  # before a message quotes it
            advice = "put it into the environment or .env, from where nothing records it"
            raise UserError(f"{self.name}: its value is an access token; {advice}")
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        expected = ""
        if type(value) is not kind:
            expected = f"{KINDS[kind]}, such as {self.default!r}"
        elif kind is float and not math.isfinite(value):
            expected = "a finite number"
        elif kind is int and abs(value) >= 2**63:
            expected = "a whole number of at most 64 bits"
        elif not all(COMPARE[sign][1](value, eval(text)) for sign, text in self.bounds):
            expected = " and ".join(f"{COMPARE[sign][0]} {text}" for sign, text in self.bounds)
        elif self.choices and not any(_matches(value, choice) for choice in self.choices):
            *first, last = map(repr, self.choices)
            expected = f"{', '.join(first)} or {last}{_nearest(value, self.choices)}"
        if expected:
            where = f"{place}: " if place else ""
            text = f"{where}{self.name}={_short(value)}: expected {expected}"
            raise UserError(f"{text} (--help explains it)")
        return value


def _choices(comment):
    """The values allowed by a comment such as `MLP: 'a' (see b) | 'c': the old one`, or []."""
    parts = re.sub(r"\((?!['\"])[^()]*\)", "", comment).split("|")
    matches = [QUOTED.search(parts[0]), *(QUOTED.match(part.strip()) for part in parts[1:])]
    if len(parts) == 1 or None in matches:
        return []
    return [match[1] or match[2] or "" for match in matches]


def _matches(value, choice):
    return value.startswith(choice[:-3]) if choice.endswith("...") else value == choice


def _short(value):
    """repr(value), short enough for a line."""
    if type(value) is int and abs(value) >= 2**63:  # repr() raises for very large ones
        return f"{value:#x}"[:40]
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}..."


def _nearest(name, known):
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# -----------------------------------------------------------------------------
# reading sources


def read_keys(path, class_name=""):
    """name -> Key of a script, or of a dataclass in it.

    The source is parsed, not imported: importing model.py would import torch.
    """
    with tokenize.open(path) as f:
        text = f.read()
    tree, title = ast.parse(text, path), os.path.basename(path)
    if class_name:
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
        if not classes:
            raise UserError(f"{path}: there is no class {class_name}, whose fields are keys")
        fields = [node for node in classes[0].body if isinstance(node, ast.AnnAssign)]
        return _keys_in(fields, text, f"{title}: {class_name}", classes[0].lineno)
    body = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or "configure(" in ast.unparse(node):
            break
        body.append(node)
    return _keys_in(body, text, title)


def _keys_in(body, text, title, last=0):
    """name -> Key of the statements in `body`, with the comments behind them and those above them
    that come after line `last`."""
    lines, keys = text.split("\n"), {}
    for node in body:
        name, default = _assignment(node)
        if name:
            above = [line.strip() for line in lines[last : node.lineno - 1]]
            above = [line for line in above if line[:1] == "#" and not line.startswith("# fmt:")]
            heading = [line.strip("# -") for line in above]
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
            comment = rest.strip("# -") if rest.startswith("#") else ""
            keys[name] = Key(name, default, comment, heading, title, node.lineno)
        if name or isinstance(node, ast.Expr):
            last = node.end_lineno
    return keys


def _assignment(node):
    """(name, default) if the statement makes a key, ("", None) otherwise."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not node.value:
        return "", None
    annotated = isinstance(node, ast.AnnAssign)
    target = node.target if annotated else node.targets[0]
    name = target.id if isinstance(target, ast.Name) else "_"
    constant = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator)
    if not all(isinstance(part, constant) for part in ast.walk(node.value)):
        return "", None
    default = eval(compile(ast.Expression(node.value), "default", "eval"))  # such as 5 * 8
    if annotated and ast.unparse(node.annotation) == "float" and type(default) is int:
        default = float(default)
    is_key = not name.startswith("_") and (annotated or name.islower()) and type(default) in KINDS
    return (name, default) if is_key else ("", None)


def _help(docstring, keys):
    lines, title = [docstring.strip()], next(iter(keys.values())).title
    for key in keys.values():
        if key.title != title:
            title = key.title
            lines += ["", f"the keys of {title}:"]
        lines += [f"\n{line}" for line in key.heading]
        lines.append(f"  --{key.name}={key.default!r}".ljust(32) + f"  {key.comment}")
    return "\n".join(lines)


def _run_config(path, current):
    """Runs a config file, which sees the current values, and returns the keys that it assigns."""
    try:
        with tokenize.open(path) as f:
            tree = ast.parse(f.read(), path)
        code = compile(tree, path, "exec")
    except SyntaxError as e:
        raise UserError(f"{path}, line {e.lineno or 1}: not valid Python: {e.msg}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        raise UserError(f"{path}: not a Python file: {e or type(e).__name__}") from None
    space = dict(current, __file__=path, __name__="__config__")
    try:
        exec(code, space)
    except (Exception, SystemExit) as e:  # whatever it raises, the user can correct
        line = e.__traceback__.tb_next.tb_lineno if e.__traceback__.tb_next else "?"
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(f"{path}, line {line}: {reason}") from None
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    stored = {n.id: n.lineno for n in reversed(names) if isinstance(n.ctx, ast.Store)}
    helpers = {n.id for n in names if isinstance(n.ctx, ast.Load)}  # what the config itself reads
    for name, line in stored.items():
        if name in space and name not in current and name not in helpers and name[0] != "_":
            hint = _nearest(name, current) or "; --help lists all keys"
            helper = f"a name that only the config uses begins with _: _{name}"
            raise UserError(f"{path}, line {line}: there is no key {name!r}{hint} ({helper})")
    here = {name: space[name] for name in current if name in space}  # a config may delete a name
    return {k: v for k, v in here.items() if k in stored or v is not current[k]}


# -----------------------------------------------------------------------------
# standard output and error, and how a script ends

# a full, read-only or protected disk, a file in place of a directory: not a bug of the program
DISK_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO),
)


class _Stream:
    """Standard output or error, replaced by os.devnull when it fails for the first time.

    Every use from then on raises that failure, an OSError with the stream's name as its filename
    (Python ignores the first, if it comes at the end of a script); with `survive` none does.
    """

    def __init__(self, stream, name, survive=False):
        self._stream, self._name, self._error, self.survive = stream, name, None, survive

    def __getattr__(self, attribute):
        return getattr(self._stream, attribute)

    def write(self, text):
        self._try("write", text)
        return len(text)

    def flush(self):
        self._try("flush")

    def _try(self, method, *args):
        try:
            getattr(self._stream, method)(*args)
        except (OSError, ValueError) as e:
            if isinstance(e, ValueError) and not self._stream.closed:
                raise
            self._error = e if isinstance(e, OSError) else OSError(errno.EBADF, str(e))
            self._error.filename, failed = self._name, self._stream
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            with contextlib.suppress(OSError, ValueError):  # buffered text and child processes
                os.dup2(self._stream.fileno(), failed.fileno())
            if self.survive and self is sys.stdout:
                reason = f"standard output is gone ({self._error.strerror}), continuing without it"
                print(f"{os.path.basename(sys.argv[0])}: {reason}", file=sys.stderr)
        if self._error and not self.survive:
            raise self._error


def survive_dead_stdout():
    """Lets a long run continue when its standard output fails: `| head`, a full disk, no terminal.

    One line on standard error says so. Call it after configure().
    """
    sys.stdout.survive = True


def _prepare_streams():
    """Lets standard output and error take every character, and opens os.devnull in place of a
    closed one. Standard error never raises; for standard output see `_Stream`."""
    for fd in (0, 1, 2):  # a file opened later must not become a standard stream
        try:
            os.fstat(fd)
        except OSError:
            devnull = os.open(os.devnull, os.O_RDWR)  # takes the lowest number, mostly fd itself
            if devnull != fd:
                os.dup2(devnull, fd)
                os.close(devnull)
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for attribute, name in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, attribute)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, _Stream):
            continue
        if hasattr(stream, "reconfigure") and not stream.closed:
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, attribute, _Stream(stream, name, survive=attribute == "stderr"))
    atexit.register(_flush_at_exit)


def _flush_at_exit():
    """Reports a standard output that fails only now; Python itself would exit with code 120."""
    try:
        sys.stdout.flush()
    except OSError as e:
        _print_exception(type(e), e, None)
        if not _is_broken_pipe(e):
            os._exit(1)


def _is_broken_pipe(error):
    """Whether the reader of standard output, such as `head`, is gone; EINVAL is Windows' word."""
    codes = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)
    return error.filename == "standard output" and error.errno in codes


def _print_warning(message, category, filename, lineno, file=None, line=None):
    """warnings.showwarning: one line, for those of this program; those of libraries as they are."""
    if category is UserWarning and os.path.dirname(filename) == os.path.dirname(__file__):
        print(f"warning: {message}", file=file or sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr)


def _print_exception(kind, error, traceback):
    """sys.excepthook: one line for a UserError, disk error or Ctrl-C, a traceback for the rest."""
    script = os.path.basename(sys.argv[0])
    if issubclass(kind, UserError):
        print(f"{script}: {error}".replace("\n", "\\n"), file=sys.stderr)  # of a name or value
    elif issubclass(kind, OSError) and error.filename == "standard output":
        sys.stdout.survive = True  # so that it is reported once
        if not _is_broken_pipe(error):
            print(f"{script}: standard output: {error.strerror}", file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in DISK_ERRORS:
        place = error.filename or "a file"
        reason = f"{error.strerror}; correct that, or choose another place"
        print(f"{script}: {place}: {reason}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print(f"\n{script}: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
