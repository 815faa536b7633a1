"""
Turns a script's own top-level variables into its command line, as nanoGPT does:

    python train.py config/smol_360m.py --batch_size=64 --dry_run

In the script, plain assignments with a trailing comment, and then one call:

    batch_size = 32   # sequences in a micro-batch
    setup = configure(globals())

Config files are Python and apply in the order given; the command line has the last word.
`--help` prints every key with its default and its comment, read from the script's source.
"""
import ast
import difflib
import errno
import os
import sys
import tokenize
import types


class UserError(ValueError):
    """Something that the user can mend: told in one line, without a traceback."""


def configure(variables, words=False, also=None, argv=None):
    """Applies config files and --key=value arguments to `variables`, the globals() of a script.

    The keys are the script's lower-case top-level variables that hold a literal, assigned before its
    first function, class or call of configure(). A word on the command line that is neither an option
    nor a .py file is an error, unless `words` is true (prepare.py's `python prepare.py tinystories`).
    `also` names a second script whose keys, with its defaults, are taken too (bench.py takes train.py's).

    Returns a namespace: `.keys` (the names), `.given` (name -> where it was set: a config file's path
    or 'command line'; absent where the default holds), `.files` (the config files), `.from_files` (the keys
    that they set, and to what), `.words`.
    Raises UserError, which from here on is printed as one line: see `_one_line`.
    """
    argv = sys.argv[1:] if argv is None else argv
    sys.excepthook = _one_line
    script = variables["__file__"]
    defaults, help_text = _read_block(script)
    if also:
        other, more_help = _read_block(os.path.join(os.path.dirname(os.path.abspath(script)), also))
        variables.update({k: v for k, v in other.items() if k not in defaults})
        defaults, help_text = {**other, **defaults}, f"{help_text}\n\nand the keys of {also}:\n{more_help}"
    if "--help" in argv or "-h" in argv:
        print(help_text)
        sys.exit(0)

    given, from_files, files, rest, options = {}, {}, [], [], []
    for arg in argv:
        if arg.startswith("--"):
            options.append(arg)
        elif arg.endswith(".py"):
            files.append(arg)
        elif words and not arg.startswith("-"):
            rest.append(arg)
        else:
            raise UserError(f"{arg!r} is neither a config file (*.py) nor an option (--key=value)")
    for path in files:
        for key, value in _read_config(path, {k: variables[k] for k in defaults}).items():
            variables[key] = from_files[key] = _checked(key, value, defaults[key], path)
            given[key] = path
    for option in options:
        key, equals, text = option[2:].partition("=")
        if key not in defaults:
            raise UserError(f"--{key}: there is no such key{_nearest(key, defaults)}; --help lists them all")
        if not equals and type(defaults[key]) is not bool:
            raise UserError(f"--{key} wants a value: --{key}={defaults[key]}")
        variables[key] = _parsed(key, text, defaults[key]) if equals else True
        given[key] = "command line"
    return types.SimpleNamespace(keys=list(defaults), given=given, from_files=from_files, files=files, words=rest)


def _read_block(script):
    """The keys of a script with their defaults, and the text of --help, both read from its source."""
    with tokenize.open(script) as f:
        source = f.read()
    lines, tree = source.splitlines(), ast.parse(source)
    with open(script, "rb") as f:
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.tokenize(f.readline)
                    if t.type == tokenize.COMMENT}
    defaults, out, last = {}, [ast.get_docstring(tree) or ""], 0
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            last = node.end_lineno  # the docstring
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or "configure(" in ast.unparse(node):
            break
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        if not name.islower() or name.startswith("_"):
            continue
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            continue
        if not isinstance(value, (bool, int, float, str)):
            continue
        defaults[name] = value
        # a comment on a line of its own heads the group of keys beneath it
        out += ["\n" + line.strip("# -") for line in lines[last:node.lineno - 1] if line.startswith("#")]
        last = node.end_lineno
        out.append(f"  --{name}={value!r}".ljust(40) + comments.get(node.lineno, ""))
    return defaults, "\n".join(out)


def _read_config(path, current):
    """Runs a config file, which sees the current values, and returns the keys that it assigns."""
    try:
        with tokenize.open(path) as f:
            source = f.read()
        tree = ast.parse(source, path)
    except FileNotFoundError:
        beside = sorted(f for f in os.listdir(os.path.dirname(path) or ".") if f.endswith(".py")) \
            if os.path.isdir(os.path.dirname(path) or ".") else []
        raise UserError(f"{path}: no such config file{_nearest(os.path.basename(path), beside)}") from None
    except SyntaxError as e:
        raise UserError(f"{path}, line {e.lineno}: not valid Python: {e.msg}") from None
    space = dict(current, __file__=path, __name__="__config__")
    try:
        exec(compile(tree, path, "exec"), space)
    except Exception as e:  # whatever the user's own file raises is the user's to mend
        line = e.__traceback__.tb_next.tb_lineno if e.__traceback__.tb_next else "?"
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    stored = {n.id: n.lineno for n in reversed(names) if isinstance(n.ctx, ast.Store)}
    read = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    for name, line in stored.items():
        # a name that the config itself reads is a helper; one that nothing reads is a slip of the pen
        if name not in current and name in space and name not in read and not name.startswith("_") \
                and isinstance(space[name], (bool, int, float, str)):
            raise UserError(f"{path}, line {line}: there is no key {name!r}{_nearest(name, current)}")
    return {k: space[k] for k in current if k in stored or space[k] is not current[k]}


def _checked(key, value, default, where):
    """`value` if it has the type of `default`; an int does where a float is wanted, and 1e9 for an int."""
    if type(value) is type(default):
        return value
    if type(default) is float and type(value) is int:
        return float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)
    raise UserError(f"{where}: {key} wants {_KIND[type(default)]}, such as {default!r}; "
                    f"got {value!r}, {_KIND.get(type(value), type(value).__name__)}")


_KIND = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _parsed(key, text, default):
    """The value of --key=text. A text is taken as it stands: --start=007 is not a number."""
    if type(default) is str:
        return text
    if type(default) is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _checked(key, value, default, "command line")


def _nearest(name, known):
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# a disk that is full, read-only or someone else's, a file where a directory should be: no mistake of the program
_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EEXIST, errno.ENOTDIR)


def _one_line(kind, error, traceback):
    """sys.excepthook: a UserError, a disk's trouble and Ctrl-C take one line, all else keeps its traceback."""
    script = os.path.basename(sys.argv[0])
    if issubclass(kind, UserError):
        print(f"{script}: {error}", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):  # `| head` has read enough; nor may the last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif issubclass(kind, OSError) and error.errno in _DISK:
        print(f"{script}: {error.filename or 'a file'}: {error.strerror}; mend that, or choose another place", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print(f"\n{script}: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
