// Renders prompts with a Modelfile's TEMPLATE as Ollama does, in Go's own text/template.
//
//	go run render.go TEMPLATE < messages.jsonl > prompts.jsonl
//
// A template gets a map with System, Messages, Tools and Response: consecutive messages of one role are joined by an
// empty line, and all system messages, joined so, are System. A template without Messages gets Prompt.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role     string `json:"role"`
	Content  string `json:"content"`
	Thinking string `json:"thinking"`
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	source, err := os.ReadFile(os.Args[1])
	check(err)
	funcs := template.FuncMap{"json": func(v any) string { b, _ := json.Marshal(v); return string(b) }}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(funcs).Parse(string(source))
	check(err)
	lines := bufio.NewReader(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var given []*message
		check(json.Unmarshal(line, &given))
		var system []string
		var joined []*message
		for _, m := range given {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
			if last := len(joined) - 1; last >= 0 && joined[last].Role == m.Role && m.Role != "tool" {
				joined[last].Content += "\n\n" + m.Content
				continue
			}
			joined = append(joined, m)
		}
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": joined, "Response": ""}
		if !strings.Contains(string(source), ".Messages") {
			values = map[string]any{"System": "", "Prompt": given[len(given)-1].Content, "Response": ""}
		}
		var text strings.Builder
		check(parsed.Execute(&text, values))
		check(out.Encode(text.String()))
	}
}
