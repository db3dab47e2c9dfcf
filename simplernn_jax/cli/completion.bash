# Complete the command simplernn from the tables of _simplernn_tables. Works in bash 3.2 and later,
# and in zsh after bashcompinit.
_simplernn() {
  local cur="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD - 1]}" flag="" prefix=""
  local commands="" configs="" flags="" file_flags="" words="" choices=""
  COMPREPLY=()
  if [[ $cur == --*=* ]]; then # zsh; bash splits words at =
    flag="${cur%%=*}" prefix="${cur%%=*}=" cur="${cur#*=}"
  elif [[ $cur == "=" ]]; then
    flag="$before" cur=""
  elif [[ $before == "=" ]]; then
    flag="${COMP_WORDS[COMP_CWORD - 2]}"
  elif [[ $before == --* ]]; then
    flag="$before"
  fi
  _simplernn_tables "${COMP_WORDS[1]}" "$flag"
  if [[ $COMP_CWORD == 1 ]]; then
    COMPREPLY=($(compgen -W "$commands" -- "$cur"))
  elif [[ -n $choices ]]; then
    COMPREPLY=($(compgen -W "$choices" -- "$cur"))
  elif [[ -n $flag && " $file_flags " == *" $flag "* ]]; then
    if [[ $flag == --config ]]; then
      COMPREPLY=($(compgen -W "$configs" -- "$cur"))
    fi
    _simplernn_files
  elif [[ $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$cur"))
  elif [[ -n $words ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
  else
    _simplernn_files
  fi
  COMPREPLY=("${COMPREPLY[@]/#/$prefix}")
}

# Not `compgen -f`, which in zsh takes --flag=FILE for a file.
_simplernn_files() {
  local file start="${cur//\\/}" # bash leaves the backslash before a space
  for file in "${start/#\~\//$HOME/}"*; do
    if [[ -e $file ]]; then
      COMPREPLY+=("$file")
    fi
  done
}

complete -o filenames -F _simplernn simplernn
